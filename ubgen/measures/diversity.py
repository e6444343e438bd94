"""How different the images of a set are from each other, from their features alone."""

from collections.abc import Iterator

import numpy as np

from ubgen.core.errors import UserError

_ROWS = 16_384  # read together, 100 MB of 768 numbers; features may lie in a file


def vendi(features_ND: np.ndarray) -> float:
    """Vendi score: the effective number of different samples, between 1 and N.

    exp of the Shannon entropy of the eigenvalues of K / N, where K holds the cosine similarities of the L2-normalised
    features (Friedman and Dieng, "The Vendi Score", Eq. 2). It cannot exceed the features' dimension D, and for N not
    far above D it still rises with N: compare sets of the same size. UserError for features that are zero or not
    finite.
    """
    shares = _spectrum(features_ND)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def rke(features_ND: np.ndarray) -> float:
    """Renyi kernel entropy score: the effective number of modes, between 1 and N. Rare samples move it less than Vendi.

    exp of the Renyi entropy of order 2 of the same eigenvalues, which is 1 / mean of all squared similarities (Jalali
    et al., "An information-theoretic evaluation of generative models in learning multi-modal distributions", with the
    cosine kernel, so that no bandwidth is to be chosen). UserError for features that are zero or not finite.
    """
    return float(1 / np.square(_spectrum(features_ND)).sum())


def within_class_variance(features_ND: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean squared distance of L2-normalised features to their class's mean, over all samples; between 0 and 1.

    UserError for features that are zero or not finite.
    """
    classes, labels = np.unique(labels_N, return_inverse=True)
    sums = np.zeros((len(classes), np.shape(features_ND)[1]))
    for start, rows in normalised_blocks(features_ND):
        np.add.at(sums, labels[start : start + len(rows)], rows)
    counts = np.bincount(labels, minlength=len(classes))
    # of unit vectors, the squared distances to their mean add up to n - n |mean|^2
    return float(1 - (np.square(sums).sum(1) / counts).sum() / len(labels))


def _spectrum(features_ND: np.ndarray) -> np.ndarray:
    """Eigenvalues of K / N, without the zeros: those of the smaller one of X X^T / N and X^T X / N."""
    count, width = np.shape(features_ND)
    if count == 0:
        raise UserError("a set without a sample has no diversity")
    if count <= width:
        rows = np.concatenate([block for _, block in normalised_blocks(features_ND)])
        kernel = rows @ rows.T
    else:
        kernel = np.zeros((width, width))
        for _, rows in normalised_blocks(features_ND):
            kernel += rows.T @ rows
    return np.clip(np.linalg.eigvalsh(kernel / count), 0, None)


def normalised_blocks(features_ND: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows in float64 of length 1). UserError for a row that is zero or not finite."""
    for start in range(0, len(features_ND), _ROWS):
        rows = np.asarray(features_ND[start : start + _ROWS], np.float64)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if (wrong := np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))).size:
            raise UserError(f"the features of sample {start + wrong[0]} are zero or not finite")
        yield start, rows / lengths
