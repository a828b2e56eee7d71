"""Dry runs, each in a fork of one process that has imported everything (`forks`): a dry run patches torch for good."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from forks import serve

#: Everything that a dry run imports, and nothing that it patches.
IMPORTED = (
    "deepspeed.runtime.zero.stage3", "torch._subclasses.fake_tensor", "torch.testing._internal.distributed.fake_pg",
    "transformers.models.gpt_neox.modeling_gpt_neox", "foretune.training.build", "foretune.dryrun.worker",
)  # fmt: skip


def _load() -> None:
    for name in IMPORTED:
        import_module(name)


def _dry_run(folder: str) -> None:
    from foretune.dryrun import worker

    worker.main(Path(folder))


if __name__ == "__main__":
    serve(_dry_run, _load)
