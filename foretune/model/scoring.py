"""How well a model predicts each document: Σ negative log-likelihood and number of targets, document by document.

    rows [B, L] (packed or not) ──decoder──▶ hidden [B, L, H] ──targets only, in chunks──▶ logits [c, V]
                                                              ──log-softmax──▶ nll [c] ──by document id──▶ sums

Logits never exist for more than a chunk of targets. Documents that share a row are kept apart by position ids that
restart, no attention mask and ``use_cache=False``: with an all-ones mask or the default cache they would leak into each
other without a word (transformers 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from foretune.artifacts import IGNORE_INDEX

#: Targets whose logits exist at the same time: 1024 x 152k x 4 bytes = 0.6 GB.
CHUNK_TARGETS = 1024
_PROBE_TOKENS = 16

Int64Array = np.ndarray[Any, np.dtype[np.int64]]
Float64Array = np.ndarray[Any, np.dtype[np.float64]]
Logits = Callable[[torch.Tensor], torch.Tensor]


class Rows(Protocol):
    """What is read of a micro-batch: int64 arrays [rows, length], as `foretune.data.MicroBatch` has them."""

    @property
    def input_ids(self) -> Int64Array: ...
    @property
    def shift_labels(self) -> Int64Array: ...
    @property
    def position_ids(self) -> Int64Array: ...
    @property
    def document_ids(self) -> Int64Array: ...


@dataclass(frozen=True)
class DocumentScores:
    """One entry per document that has targets, in ascending order of its id.

    Attributes:
        document_ids: int64 [D].
        nll_sum: float64 [D], nats, summed over the document's targets.
        target_tokens: int64 [D].
    """

    document_ids: Int64Array
    nll_sum: Float64Array
    target_tokens: Int64Array


def score_documents(
    model: Any, batches: Iterable[Rows], device: torch.device, *, chunk_targets: int = CHUNK_TARGETS
) -> DocumentScores:
    """Score documents with a causal LM, plain or wrapped by peft.

    Args:
        model: already on `device`; left in the mode (train or eval) that it was in.
        batches: rows of any layout; a document may lie in one row only.
        chunk_targets: bound on the logits that exist at once.
    """
    ids, nlls = [], []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            split: bool | None = None
            for batch in batches:
                if split is None:
                    split = _head_is_all_there_is(model, batch, device)
                index = np.flatnonzero(batch.shift_labels.reshape(-1) != IGNORE_INDEX)
                if len(index):
                    ids.append(batch.document_ids.reshape(-1)[index])
                    nlls.append(_nll(model, batch, index, device, split=split, chunk_targets=chunk_targets))
    finally:
        model.train(was_training)
    all_ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
    all_nlls = np.concatenate(nlls) if nlls else np.zeros(0)
    unique, place = np.unique(all_ids, return_inverse=True)
    return DocumentScores(
        document_ids=unique.astype(np.int64),
        nll_sum=np.bincount(place, weights=all_nlls, minlength=len(unique)).astype(np.float64),
        target_tokens=np.bincount(place, minlength=len(unique)).astype(np.int64),
    )


def fitting_device(model: torch.nn.Module) -> torch.device:
    """The GPU if there is one with room for the model and a third more, else the CPU."""
    if torch.cuda.is_available():
        needed = sum(parameter.nbytes for parameter in model.parameters())
        if torch.cuda.mem_get_info()[0] > needed * 4 // 3:
            return torch.device("cuda")
    return torch.device("cpu")


def _nll(
    model: Any, batch: Rows, index: Int64Array, device: torch.device, *, split: bool, chunk_targets: int
) -> Float64Array:
    """Negative log-likelihoods of the targets at the flat positions `index`; float64 [T]."""
    targets = torch.from_numpy(batch.shift_labels.reshape(-1)[index]).to(device)
    where = torch.from_numpy(index).to(device)
    if split:
        core = _core(model)
        hidden = core.get_decoder()(**_inputs(batch, device)).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1])[where]
        head: Logits = core.get_output_embeddings()
    else:  # the model's own forward does more than a linear head (soft-capping, scaling): whole logits, as they are
        logits = model(**_inputs(batch, device)).logits
        chosen = logits.reshape(-1, logits.shape[-1])[where]
        head = _as_they_are
    pieces = [
        _chunk_nll(head(chosen[start : start + chunk_targets]), targets[start : start + chunk_targets])
        for start in range(0, len(index), chunk_targets)
    ]
    return torch.cat(pieces).double().cpu().numpy()


def _chunk_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.logsumexp(wide, dim=-1) - wide.gather(1, targets[:, None])[:, 0]


def _as_they_are(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _inputs(batch: Rows, device: torch.device) -> dict[str, Any]:
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(batch.input_ids)).to(device),
        "position_ids": torch.from_numpy(np.ascontiguousarray(batch.position_ids)).to(device),
        "use_cache": False,
    }


def _core(model: Any) -> Any:
    """The transformers model inside a peft one; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_is_all_there_is(model: Any, batch: Rows, device: torch.device) -> bool:
    """Whether the model's logits are its output embedding of its decoder's last hidden state, tried on a few tokens.

    Asking the model is safer than knowing every family: some cap, scale or multiply in between.
    """
    core = _core(model)
    tokens = torch.from_numpy(np.ascontiguousarray(batch.input_ids[:1, :_PROBE_TOKENS])).to(device)
    try:
        split = core.get_output_embeddings()(core.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError, NotImplementedError):
        return False
    own = model(input_ids=tokens, use_cache=False).logits
    return bool(torch.allclose(split, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())))
