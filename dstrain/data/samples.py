"""Position -> sample, with no state and no table.

The documents of a token file, each with its end-of-document token, form one stream (packing without a cross-sample
mask, DeepSeek-V3 section 4.1). It is cut into windows of `seq_len` tokens, which overlap only by the `lookahead` tokens
that serve as targets; every epoch visits the windows in another pseudo-random order.

Fill-in-the-middle turns a document  prefix middle suffix EOD  into  <begin> prefix <hole> suffix <end> middle EOD.
Which documents, and where they are cut, depends on the seed and the document's number alone; each becomes three tokens
longer, so the stream's positions behind it shift by three.
"""

from collections.abc import Iterator

import numpy as np

from dstrain.data.indexed import TokenFile
from dstrain.data.shuffle import derive_key, mix, permute
from dstrain.data.tokenizer import FimTokens
from dstrain.errors import UserError


class TokenStream:
    """A token file as a sequence in which some documents are rearranged for fill-in-the-middle."""

    def __init__(self, file: TokenFile, fim: FimTokens | None = None, fim_rate: float = 0.0, key: int = 0):
        self._tokens, self._fim, self._key = file.tokens, fim, key
        self._chosen = np.zeros(0, np.int64)
        self._starts = self._stops = self._chosen
        if fim is not None and fim_rate > 0:
            self._choose(file.document_starts(), fim_rate)
        # Where the chosen documents lie in the stream; starts and stops are places in the file.
        grown = 3 * np.arange(len(self._chosen) + 1)
        self._stream_starts, self._stream_stops = self._starts + grown[:-1], self._stops + grown[1:]
        self.length = len(self._tokens) + int(grown[-1])

    def _choose(self, starts: np.ndarray, rate: float) -> None:
        draws = mix(np.arange(len(starts) - 1, dtype=np.uint64) ^ np.uint64(self._key))
        self._chosen = np.flatnonzero((draws >> np.uint64(11)) * 2.0**-53 < rate)
        self._starts, self._stops = starts[self._chosen], starts[self._chosen + 1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream; 1-D of length stop - start."""
        return np.concatenate(list(self._pieces(start, stop)))

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        # The first chosen document that does not end before `start`; as many lie before it, each three tokens longer.
        number = int(np.searchsorted(self._stream_stops, start, side="right"))
        while start < stop:
            begin = int(self._stream_starts[number]) if number < len(self._chosen) else stop
            if start < begin:
                end = min(stop, begin)
                yield self._tokens[start - 3 * number : end - 3 * number]
            else:
                end = min(stop, int(self._stream_stops[number]))
                yield from _cut(self._rearranged(number), start - begin, end - begin)
                number += 1
            start = end

    def _rearranged(self, number: int) -> list[np.ndarray]:
        """The parts of a chosen document in their new order; its last token, the end of document, stays last."""
        document = self._tokens[int(self._starts[number]) : int(self._stops[number])]
        content, eod = document[:-1], document[-1:]
        ends = [derive_key(self._key, int(self._chosen[number]), end) % (len(content) + 1) for end in (1, 2)]
        left, right = min(ends), max(ends)
        begin, hole, end = (np.array([token]) for token in self._fim or ())
        return [begin, content[:left], hole, content[right:], end, content[left:right], eod]


def _cut(parts: list[np.ndarray], start: int, stop: int) -> Iterator[np.ndarray]:
    """[start, stop) of the concatenation of `parts`, without making it."""
    for part in parts:
        yield part[max(0, start) : max(0, stop)]
        start, stop = start - len(part), stop - len(part)


class Corpus:
    """An endless supply of samples from one stream: epoch after epoch of its windows, each in its own order."""

    def __init__(self, stream: TokenStream, *, seq_len: int, lookahead: int, key: int, name: str):
        self._stream, self._seq_len, self._lookahead, self._key = stream, seq_len, lookahead, key
        self.num_windows = max(0, stream.length - lookahead) // seq_len
        if not self.num_windows:
            raise UserError(
                f"{name} has {stream.length:,} tokens, less than one sample of train.seq_len={seq_len} and "
                f"{lookahead} further tokens. Give more text or a smaller train.seq_len."
            )

    def sample(self, position: int) -> np.ndarray:
        """Sample number `position` >= 0: [seq_len + lookahead] tokens."""
        epoch, index = divmod(position, self.num_windows)
        start = self._seq_len * permute(index, self.num_windows, derive_key(self._key, epoch))
        return self._stream.read(start, start + self._seq_len + self._lookahead)
