"""What is found in a model folder before anything slow starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from foretune.errors import UserError
from foretune.pipeline.first_look import look_at_model

STORIES = Path(__file__).parents[2] / "models" / "stories260K"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORIES, tmp_path / "m"))


def test_a_good_model_passes(folder: Path) -> None:
    save_file({}, folder / "empty.safetensors")
    save_file({"scalar": np.zeros((), dtype=np.float32)}, folder / "scalar.safetensors", metadata={"format": "pt"})
    look_at_model(folder, trust_remote_code=False)


@pytest.mark.parametrize("keep", [0, 4, 8, 2000, 500_000, -1, None])
def test_a_torn_file_is_refused_wherever_it_is_torn(folder: Path, keep: int | None) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0" if keep is None else whole[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is torn"):
        look_at_model(folder, trust_remote_code=False)
    look_at_model(folder, trust_remote_code=False, weights=False)


def test_other_things_under_that_name_are_refused(folder: Path) -> None:
    for content in (b"PK\x03\x04" * 1000, (20).to_bytes(8, "little") + b"[1, 2, 3]" + b" " * 11):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="torn or no safetensors"):
            look_at_model(folder, trust_remote_code=False)


@pytest.mark.parametrize(
    ("model_type", "refused"), [("strange", True), ("qwen2", False), ("gpt2", False), (None, True)]
)
def test_own_code_is_refused_unless_transformers_has_the_model(
    folder: Path, model_type: str | None, refused: bool
) -> None:
    path = folder / "config.json"
    auto_map = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type, "auto_map": auto_map}))
    look_at_model(folder, trust_remote_code=True)
    if not refused:
        look_at_model(folder, trust_remote_code=False)
        return
    with pytest.raises(UserError) as caught:
        look_at_model(folder, trust_remote_code=False)
    assert caught.value.field == "trust_remote_code"
