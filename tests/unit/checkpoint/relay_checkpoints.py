"""A rank's main: loads checkpoints of other layouts, and saves them as this layout has them.

in: ``--made FOLDER`` of write_engine_checkpoints.py, ``--out FOLDER --pairs A:TARGET,…`` (names of `CASES`)   out:
FOLDER/A-as-TARGET/step-00000002/, complete, and FOLDER/A-as-TARGET/groups.json, the optimizer's groups by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

from write_engine_checkpoints import CASES, STEP, build_engine, write_manifest


def relay(source: str, target: str, made: Path, out: Path, device: Any) -> None:
    import torch

    from foretune.checkpoint import layout
    from foretune.checkpoint.snapshot import FolderWriter
    from foretune.checkpoint.store import verify
    from foretune.checkpoint.whole_states import MASTER, whole_states

    # The same model, laid out as the target is.
    fields = ("stage", "precision", "zero", "accumulate_in_fp32", "streamed")
    case = dataclasses.replace(CASES[source], **{name: getattr(CASES[target], name) for name in fields})
    folder = layout.folder_of(made / source / "checkpoints", STEP)
    engine, model = build_engine(case, made / source / "base", device)
    manifest = verify(folder)
    engine._load_other_layout(folder, manifest)  # also where it is the same
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    groups = [[names[parameter] for parameter in group] for group in engine._groups]
    checkpoints = out / f"{source}-as-{target}"
    partial_folder = layout.partial_folder_of(checkpoints, STEP)
    engine.save(FolderWriter(partial_folder))
    torch.distributed.barrier()
    if engine.rank == 0:
        write_manifest(case, partial_folder)
        (checkpoints / "groups.json").write_text(json.dumps(groups))
    torch.distributed.barrier()
    # What forward uses are the masters, rounded; and a step can be taken, which every state counts once.
    masters = whole_states(folder, manifest, groups=groups).tensors
    for parameter, name in names.items():
        if parameter.requires_grad:
            with engine.whole_parameters([parameter]):
                assert torch.equal(parameter.detach().flatten(), masters[name][MASTER]().to(parameter.dtype)), name
    rows = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
    assert engine.step(1e-2).applied
    counts = {float(state["step"]) for state in engine._torch_optimizer.state.values() if "step" in state}
    assert counts == ({STEP + 1} if case.optimizer == "adamw" else set()), counts
    del engine, model
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--made", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", required=True)
    arguments = parser.parse_args()

    from foretune.distributed import die_with_parent, leave, rank_info
    from foretune.engine import close_group, open_group

    die_with_parent()
    device = open_group(rank_info())
    for pair in arguments.pairs.split(","):
        source, target = pair.split(":")
        print(f"pair {pair}", flush=True)
        relay(source, target, arguments.made, arguments.out, device)
    close_group()
    leave()


if __name__ == "__main__":
    main()
