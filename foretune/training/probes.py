"""What is asked of the model around training: does packing isolate documents here, and what are its logits at the end.

Both run the same forward passes on every rank, which ZeRO-3 needs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from foretune.artifacts import IGNORE_INDEX
from foretune.data import Loader, MicroBatch
from foretune.engine import Engine
from foretune.training.objective import negative_log_likelihood, to_device

#: A document that sees its neighbour is wrong by 1-6 nats on its first tokens; these bound rounding alone.
ISOLATION_TOLERANCE = {"fp32": 5e-4, "bf16": 5e-2, "fp16": 2e-2}
_PROBE_TOKENS = 48  # per document: leaks show at a document's start
_REFERENCE_ROWS = 8
_REFERENCE_TOKENS = 64
_REFERENCE_POSITIONS = 8  # per row; bounds the file at 8 x 8 x V x 4 bytes (39 MB for a vocabulary of 152k)


def isolation_error(engine: Engine, loader: Loader) -> float | None:
    """How far the training path is from the model's own, in nats per target token.

    Trains' path: two documents packed in one row, fused loss. The model's own: each document alone, whole logits.
    None if the first batch holds no two documents to try.
    """
    documents = _two_documents(loader)
    if documents is None:
        return None
    (first, first_labels), (second, second_labels) = documents
    ids = np.concatenate([first, second])[None]
    labels = np.concatenate([first_labels, second_labels])[None]
    positions = np.concatenate([np.arange(len(first)), np.arange(len(second))])[None]
    targets = int((labels != IGNORE_INDEX).sum())
    packed = MicroBatch(input_ids=ids, shift_labels=labels, position_ids=positions, document_ids=np.zeros_like(ids))
    engine.module.eval()
    with torch.no_grad():
        packed_nll = float(engine(**to_device(packed, engine.device)))
        alone = torch.zeros((), dtype=torch.float64)
        for tokens, document_labels in documents:
            alone += _plain_nll(engine, tokens, document_labels).cpu()
    engine.module.train()
    return abs(packed_nll - float(alone)) / targets


def held_out_loss(engine: Engine, batches: list[MicroBatch]) -> tuple[float, int]:
    """The mean loss over all ranks' held-out micro-batches (nats per target token), and how many targets they hold.

    No random number is drawn and no gradient is kept: training goes on as if it had not been asked.
    """
    was_training = engine.module.training
    engine.module.eval()
    nll = torch.zeros((), dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for batch in batches:
            nll += negative_log_likelihood(engine, to_device(batch, engine.device))
    engine.module.train(was_training)
    targets = sum(int((batch.shift_labels != IGNORE_INDEX).sum()) for batch in batches)
    total, count = engine.sum_over_ranks([nll, float(targets)])
    return total / count, int(count)


def write_reference_logits(engine: Engine, loader: Loader, path: Path) -> None:
    """Write what the trained engine says on fixed rows, for an export to reproduce.

    File: ``input_ids``, ``attention_mask`` int64 [8, T]; ``positions`` int64 [8, P]; ``logits`` float32 [8, P, V].
    Rows are the starts of the first documents of step 0, padded on the right. Rank 0 writes.
    """
    from safetensors.torch import save_file

    rows = [tokens[:_REFERENCE_TOKENS] for tokens in loader.first_documents(_REFERENCE_ROWS)]
    length = max(len(row) for row in rows)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    positions = np.zeros((len(rows), _REFERENCE_POSITIONS), dtype=np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row
        attention_mask[number, : len(row)] = 1
        positions[number] = np.linspace(0, len(row) - 1, _REFERENCE_POSITIONS).round()
    ids, mask = torch.from_numpy(input_ids), torch.from_numpy(attention_mask)
    was_training = engine.module.training
    engine.module.eval()
    with torch.no_grad():
        logits = engine(input_ids=ids.to(engine.device), attention_mask=mask.to(engine.device), use_cache=False).logits
    engine.module.train(was_training)
    if engine.rank == 0:
        chosen = (
            logits.float().cpu().gather(1, torch.from_numpy(positions)[:, :, None].expand(-1, -1, logits.shape[-1]))
        )
        tensors = {
            "input_ids": ids,
            "attention_mask": mask,
            "positions": torch.from_numpy(positions),
            "logits": chosen.contiguous(),
        }
        save_file(tensors, str(path))


def _plain_nll(engine: Engine, tokens: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """Σ nll of one document by the model's own forward, whole logits; float64 scalar."""
    logits = engine(input_ids=torch.from_numpy(tokens[None]).to(engine.device), use_cache=False).logits[0]
    target = torch.from_numpy(labels).to(engine.device)
    return F.cross_entropy(logits.double(), target, ignore_index=IGNORE_INDEX, reduction="sum")


def _two_documents(loader: Loader) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Two documents' (tokens, shifted labels), cut short, every token a target."""
    found = []
    for tokens in loader.first_documents(2):
        cut = tokens[: _PROBE_TOKENS + 1]
        found.append((cut[:-1].copy(), cut[1:].copy()))
    return found if len(found) == 2 else None
