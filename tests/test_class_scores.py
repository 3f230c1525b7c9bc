"""The scores of classes are scikit-learn's, to the last bit."""

from __future__ import annotations

import warnings

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from fslora.metrics import class_scores

PAIRS = st.integers(1, 6).flatmap(
    lambda classes: st.tuples(
        st.just(classes), st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1)
    )
)


@settings(deadline=None)
@given(PAIRS)
def test_they_are_those_of_scikit_learn(drawn):
    """Accuracy, macro F1 over what occurs or is predicted, Matthews; F1 of class 1 where there are two classes."""
    classes, pairs = drawn
    labels, predicted = np.array(pairs).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "accuracy": float((predicted == labels).mean()),
            "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
            "matthews": float(matthews_corrcoef(labels, predicted)),
        }
        if classes == 2:
            expected["f1"] = float(f1_score(labels, predicted, labels=[1], average="macro", zero_division=0.0))
    assert class_scores(predicted, labels, classes) == expected
