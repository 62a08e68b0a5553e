"""Item vectors: aligned to the candidates, standardised with NaN left out, saved with their ids."""

import numpy as np
import pytest

from recllm.ranking import ItemIndex
from recllm.vectors import RawVectors, Standard, item_features

VALUES = np.array([[1.0, 0.0], [3.0, 4.0], [np.nan, np.nan], [5.0, 2.0]], dtype=np.float32)


def test_rows_follow_the_index_and_unknown_items_are_nan():
    aligned = RawVectors(("a", "b", "c", "d"), VALUES).align(ItemIndex(["d", "x", "a"]))
    assert aligned.dtype == np.float32
    assert aligned[[0, 2]].tolist() == [[5.0, 2.0], [1.0, 0.0]]
    assert np.isnan(aligned[1]).all()


def test_standardising_gives_zero_mean_and_unit_mean_square_over_the_known_rows():
    found = Standard.fit(VALUES)(VALUES)
    known = found[[0, 1, 3]]
    assert known.mean(axis=0) == pytest.approx([0.0, 0.0], abs=1e-6)
    assert np.square(known).mean() == pytest.approx(1.0, rel=1e-6)
    assert np.isnan(found[2]).all()


def test_one_scale_for_all_columns_keeps_the_angles():
    centred = VALUES[:2] - np.nanmean(VALUES, axis=0)
    found = Standard.fit(VALUES)(VALUES)[:2]
    cosine = lambda pair: pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1])  # noqa: E731
    assert cosine(found) == pytest.approx(cosine(centred), rel=1e-5)


@pytest.mark.parametrize("values", [np.full((2, 3), np.nan), np.ones((2, 3))], ids=["nothing known", "all equal"])
def test_nothing_to_measure_leaves_a_scale_of_one(values):
    standard = Standard.fit(values.astype(np.float32))
    assert standard.scale == 1.0
    assert np.isfinite(standard.mean).all()


def test_features_stand_in_the_order_of_the_index_with_nan_for_what_is_missing():
    index = ItemIndex(["b", "new", "a"])
    factors = RawVectors(("a", "b"), np.array([[1.0], [-1.0]], dtype=np.float32))
    features, text_standard, _ = item_features(index, RawVectors(("a", "b", "c", "d"), VALUES), factors)
    assert features.factors[:, 0].tolist() == pytest.approx([-1.0, np.nan, 1.0], nan_ok=True)
    assert features.text[0] == pytest.approx(text_standard(VALUES[1:2])[0])
    assert np.isnan(features.text[1]).all()


def test_saving_keeps_values_and_ids(tmp_path):
    vectors = RawVectors(("a", "b", "c", "d"), VALUES)
    vectors.save(tmp_path / "deep" / "vectors.safetensors")
    found = RawVectors.load(tmp_path / "deep" / "vectors.safetensors")
    assert found.ids == vectors.ids
    assert np.array_equal(found.values, VALUES, equal_nan=True)


def test_vectors_appear_only_when_their_ids_are_there(tmp_path, monkeypatch):
    """Whoever finds the vectors may read the ids beside them."""
    monkeypatch.setattr("recllm.vectors.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        RawVectors(("a", "b", "c", "d"), VALUES).save(tmp_path / "v.safetensors")
    assert (tmp_path / "v.ids.json").is_file()
    assert not (tmp_path / "v.safetensors").exists()
