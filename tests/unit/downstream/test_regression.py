"""One regression, however it is found."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sparse
from sklearn.linear_model import LogisticRegression

from downstream.regression import chosen, cuts_of, probabilities, regress


def test_few_notes_with_many_features_give_the_same_regression() -> None:
    random = np.random.default_rng(0)
    features = sparse.random(60, 500, 0.1, "csr", random_state=1)
    labels = random.integers(0, 3, 60)
    found = regress(features, labels, 10.0)
    plain = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000, tol=1e-6).fit(features, labels)
    asked = sparse.random(40, 500, 0.1, "csr", random_state=2)
    said = probabilities(found, asked)
    np.testing.assert_allclose(said, plain.predict_proba(asked), atol=0.03)
    several = np.stack([labels == 0, labels == 1], 1).astype(int)
    found = regress(features, several, 10.0)
    said = probabilities(found, asked)
    for k in range(2):
        one = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000, tol=1e-6)
        np.testing.assert_allclose(said[:, k], one.fit(features, several[:, k]).predict_proba(asked)[:, 1], atol=0.03)


def test_what_is_said_of_a_note_by_fits_without_it_stands_in_its_row() -> None:
    random = np.random.default_rng(3)
    features, patients = sparse.csr_matrix(random.normal(size=(60, 5))), [f"p{n // 2}" for n in range(60)]
    labels = (features.toarray()[:, 0] + random.normal(size=60) > 0).astype(int)
    found = chosen(features, labels, patients, (0.1, 10.0), 1)
    assert found.said_NK is not None
    for learned, left in cuts_of(labels, patients, 1):
        assert not {patients[i] for i in learned} & {patients[i] for i in left}
        said = probabilities(regress(features[learned], labels[learned], found.strength), features[left])
        np.testing.assert_allclose(found.said_NK[left], said)
    alone = np.arange(60) % 2
    alone[7] = 2
    assert chosen(features, alone, patients, (1.0,), 1).said_NK is None  # one fold has not learned of the class
