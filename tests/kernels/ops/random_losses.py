"""The random losses on which the properties of `ensemble_kl` are tested, whatever the backend."""

from typing import Any

from hypothesis import strategies as st

DIVERGENCES = ("forward", "reverse", "jsd")
RANDOM_LOSSES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 10**6),
    "students": st.integers(1, 3),
    "teachers": st.integers(0, 2),
    "vocabulary": st.integers(2, 40),
    "scale": st.sampled_from([1e-3, 1.0, 10.0]),
    "temperature": st.sampled_from([0.5, 1.0, 2.0]),
    "divergence": st.sampled_from(DIVERGENCES),
}
