"""The final norm and the output embedding (the head), streamed in chunks of the vocabulary.

In: the last layer's hidden states. Out: the negative log-likelihood of every token but the first,
the log-likelihood of chosen tokens, logits, or the most likely tokens with their log-probabilities.
The head is read in chunks of rows, and each chunk is multiplied with blocks of tokens; the next
chunk is read in the background. Holds two chunks and the logits of one block for one chunk. A head
that is one chunk is kept.

Shape suffixes: B windows, S tokens, H hidden channels, V vocabulary, v rows of a chunk, T tokens of
a block or chosen ones, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from frugal_bonsai.accelerator import to_device
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.progress import Progress
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.int8_linear import tokens_at_once
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.micro_batch import MicroBatches
from frugal_bonsai.stream.scratch import Scratch
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.stream.source import HEAD_WEIGHT, LayerSource
from frugal_bonsai.stream.stored_weight import multiply_into
from frugal_bonsai.stream.vocabulary_sums import RunningLosses, RunningScores, RunningTop


class Head:
    """Final norm and output embedding of a model.

    Args:
        skeleton: gives the final norm, device and dtype.
        rows: the output embedding in chunks of rows.
        open_stream: opens a stream of the chunks.
        tokens: number of tokens whose logits are held at a time; halved when memory runs out.
        progress: gets a note when memory runs out.

    Attributes:
        batches: number of tokens whose logits are held at a time.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        rows: LayerSource,
        open_stream: Callable[[LayerSource], LayerStream],
        *,
        tokens: int,
        progress: Progress | None = None,
    ) -> None:
        self._skeleton, self._rows, self._open_stream = skeleton, rows, open_stream
        self.batches = MicroBatches(
            tokens, unit="tokens", what="block of logits", progress=progress
        )
        self._kept: torch.Tensor | None = None

    @property
    def to_read(self) -> LayerSource | None:
        """The chunks that the next call reads; None if the head is kept."""
        return self._rows if self._kept is None else None

    def nll(
        self,
        hidden: HiddenStates,
        tokens_BS: torch.Tensor,
        *,
        scale: float = 1.0,
        normed: bool = False,
    ) -> torch.Tensor:
        """Return the negative log-likelihood of tokens 2..S of each window, in nats.

        Args:
            hidden: the last layer's hidden states; overwritten with the final norm's output.
            tokens_BS: the windows.
            scale: factor of the final norm's output.
            normed: whether an earlier call has overwritten the hidden states.

        Returns:
            fp32 ``[B, S-1]``, on the CPU.
        """
        windows, window = tokens_BS.shape
        device = self._skeleton.device
        spread_BS = torch.full((windows, window - 1), -torch.inf, device=device)
        target_BS = torch.zeros(windows, window - 1, device=device)
        following_BS = to_device(tokens_BS[:, 1:].contiguous(), device)

        def sums(here: slice, first: int) -> RunningLosses:
            return RunningLosses(
                following_BS[here].view(-1) - first,
                target_BS[here].view(-1),
                spread_BS[here].view(-1),
            )

        self._pass_chunks(hidden, sums, scale=scale, normed=normed)
        return (spread_BS - target_BS).cpu()

    def score(
        self,
        hidden: HiddenStates,
        places_T: tuple[torch.Tensor, torch.Tensor],
        following_T: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-likelihood of chosen tokens, and whether each is the most likely one.

        Args:
            hidden: the last layer's hidden states; overwritten with the final norm's output.
            places_T: window and position whose next token is meant, int64 ``[T]`` each, CPU; the
                windows in ascending order.
            following_T: the next tokens, int64 ``[T]``, CPU.

        Returns:
            fp32 ``[T]`` in nats and bool ``[T]``, on the CPU.
        """
        device, (window_T, position_T) = self._skeleton.device, places_T
        target_T = torch.zeros(len(window_T), device=device)
        spread_T, best_T = torch.full_like(target_T, -torch.inf), target_T - torch.inf
        greedy_T = torch.zeros(len(window_T), dtype=torch.bool, device=device)
        token_T = to_device(following_T, device)

        def chosen(here: slice) -> slice:
            bounds = torch.searchsorted(window_T, torch.tensor([here.start, here.stop]))
            return slice(*bounds.tolist())

        def pick(here: slice, states_BSH: torch.Tensor) -> torch.Tensor:
            at = chosen(here)
            rows_T, columns_T = window_T[at] - here.start, position_T[at]
            return states_BSH[to_device(rows_T, device), to_device(columns_T, device)]

        def sums(here: slice, first: int) -> RunningScores:
            at = chosen(here)
            return RunningScores(
                token_T[at] - first, target_T[at], spread_T[at], best_T[at], greedy_T[at]
            )

        self._pass_chunks(hidden, sums, pick=pick)
        return (target_T - spread_T).cpu(), greedy_T.cpu()

    def top(
        self, hidden: HiddenStates, count: int, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the most likely next tokens after tokens 1..S-1 of each window.

        Args:
            hidden: the last layer's hidden states; overwritten with the final norm's output.
            count: K, at most V.
            temperature: the logits are divided by it.

        Returns:
            Log-probabilities fp32 ``[B, S-1, K]`` in descending order, and the tokens' numbers
            int32 ``[B, S-1, K]``, on the device.
        """
        shape, device = (hidden.windows, hidden.window - 1), self._skeleton.device
        spread_BS = torch.full(shape, -torch.inf, device=device)
        values_BSK = torch.full((*shape, count), -torch.inf, device=device)
        ids_BSK = torch.zeros(*shape, count, dtype=torch.int32, device=device)

        def sums(here: slice, first: int) -> RunningTop:
            return RunningTop(
                values_BSK[here].flatten(0, 1),
                ids_BSK[here].flatten(0, 1),
                spread_BS[here].view(-1),
                first,
                temperature,
            )

        self._pass_chunks(hidden, sums)
        return values_BSK.sub_(spread_BS[..., None]), ids_BSK

    def _pass_chunks(
        self,
        hidden: HiddenStates,
        sums: Callable[[slice, int], RunningLosses | RunningTop],
        *,
        scale: float = 1.0,
        normed: bool = False,
        pick: Callable[[slice, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Norm the hidden states, then add each chunk's logits to running sums, block by block.

        ``pick`` returns the tokens ``[T, H]`` of a slice of windows; None takes all but the last of
        each window.
        """
        windows, window = hidden.windows, hidden.window

        def norm(here: slice) -> None:
            hidden.write(here, self._skeleton.norm(hidden.read(here)))

        if not normed:
            self.batches.run(windows, norm, weight=window)
        first, room = 0, Scratch(self._skeleton.device)
        for weight_vH in self._chunks():

            def add(here: slice, first: int = first, weight_vH: torch.Tensor = weight_vH) -> None:
                running, most = sums(here, first), tokens_at_once(weight_vH)
                states_BSH = hidden.read(here)
                normed_TH = pick(here, states_BSH) if pick else states_BSH[:, :-1].flatten(0, 1)
                if scale != 1.0:
                    normed_TH = normed_TH * scale
                self.batches.run(
                    len(normed_TH),
                    lambda block: running.add(
                        block, self._logits(normed_TH[block], weight_vH, room)
                    ),
                    most=most,
                )

            self.batches.run(windows, add, weight=window)
            first += len(weight_vH)

    def logits(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """Return the logits of all tokens over the whole vocabulary, fp32 ``[B, S, V]``."""
        normed_BSH = self._skeleton.norm(hidden_BSH)
        normed_TH, parts = normed_BSH.flatten(0, -2), []
        for weight_vH in self._chunks():
            own = Scratch(self._skeleton.device)
            parts.append(self._logits(normed_TH, weight_vH, own).float())
        return torch.cat(parts, dim=-1).view(*normed_BSH.shape[:-1], -1)

    def _logits(
        self, normed_TH: torch.Tensor, weight_vH: torch.Tensor, room: Scratch
    ) -> torch.Tensor:
        """Return logits for the rows of a chunk, in memory that the next call overwrites."""
        logits_Tv = room.take(len(normed_TH), len(weight_vH), normed_TH.dtype)
        multiply_into(normed_TH, weight_vH, logits_Tv)
        return scale_and_cap_(logits_Tv, self._skeleton.spec)

    def _chunks(self) -> Iterator[torch.Tensor]:
        """Yield rows ``[v, H]`` in order; a head that is one chunk is read once and kept."""
        if self._kept is not None:
            yield self._kept
            return
        with self._open_stream(self._rows) as stream:
            for _, parameters in stream.visit():
                if stream.source.layers == 1:
                    self._kept = parameters[HEAD_WEIGHT]
                yield parameters[HEAD_WEIGHT]


def scale_and_cap_(logits: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """Divide logits and cap them softly as the model does, in place unless they have gradients.

    Returns:
        cap * tanh(logits / divisor / cap), or without a cap logits / divisor.
    """
    if spec.logits_divisor != 1.0:
        logits.div_(spec.logits_divisor)
    cap = spec.logits_softcap
    if cap is None:
        return logits
    capped = logits.div_(cap).tanh_()
    # The gradient of tanh needs its result, which must not be overwritten then.
    return capped * cap if capped.requires_grad else capped.mul_(cap)
