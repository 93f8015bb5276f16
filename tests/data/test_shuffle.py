from collections import Counter

import numpy as np
import pytest

from dstrain.data.shuffle import blend, blend_shares, derive_key, mix, permute

PINNED = [5, 9, 4, 2, 1, 3, 8, 0, 7, 6]


def test_mix_is_splitmix64() -> None:
    """The first outputs of the reference generator with seed 0."""
    gamma = 0x9E3779B97F4A7C15
    outputs = [mix(gamma * n & (2**64 - 1)) for n in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_mix_of_an_array_agrees_with_integers() -> None:
    values = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert mix(values).tolist() == [mix(int(value)) for value in values]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    for key in range(3):
        assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_depends_on_the_key_and_is_stable() -> None:
    """The literal numbers keep runs of old checkpoints on the data they have not seen."""
    assert [permute(index, 10, derive_key(1, 2)) for index in range(10)] == PINNED
    assert [permute(index, 10, derive_key(1, 3)) for index in range(10)] != PINNED
    assert permute(10**12, 10**13, 7) != permute(10**12, 10**13, 8)


def test_permute_is_close_to_uniform() -> None:
    """Over many keys, chi-squared of where an index lands, 15 degrees of freedom: 99.9 % lie below 37.7."""
    size, keys = 16, 4000
    for index in (0, 7):
        counts = Counter(permute(index, size, derive_key(key)) for key in range(keys))
        assert sum((counts[n] - keys / size) ** 2 for n in range(size)) / (keys / size) < 37.7


def test_pairs_land_close_to_uniform() -> None:
    """Chi-squared of where the first two of six land, 29 degrees of freedom: 99.9 % lie below 58.3."""
    size, keys = 6, 6000
    places = (derive_key(key) for key in range(keys))
    counts = Counter((permute(0, size, key), permute(1, size, key)) for key in places)
    expected = keys / (size * (size - 1))
    assert len(counts) == size * (size - 1)
    assert sum((count - expected) ** 2 for count in counts.values()) / expected < 58.3


def test_neighbours_do_not_stay_neighbours() -> None:
    places = np.array([permute(index, 5000, 3) for index in range(5000)])
    assert (np.abs(np.diff(places)) == 1).mean() < 0.002
    assert abs(np.corrcoef(np.arange(5000), places)[0, 1]) < 0.05


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.2, 0.1], [1, 2, 3, 4, 5], [1e-3, 1], [1, 1e-3], [0.1] * 7])
def test_blend_keeps_proportions_and_counts_each_corpus_without_gaps(weights: list[float]) -> None:
    shares = blend_shares(weights)
    counts = [0] * len(weights)
    for position in range(5000):
        corpus, own = blend(position, shares)
        assert own == counts[corpus]
        counts[corpus] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (position + 1) * weight / sum(weights)) < len(weights)


def test_blend_is_exact_far_out() -> None:
    shares = blend_shares([0.3, 0.7])
    corpora = [blend(10**13 + n, shares) for n in range(1000)]
    first = [own for corpus, own in corpora if corpus == 0]
    assert first == list(range(first[0], first[0] + len(first)))
    assert abs(first[0] - 3 * 10**12) < 10
    assert abs(len(first) - 300) <= 1
