"""From stored embeddings to a head: data sets, scikit-learn estimators, evaluation, bundles, predictions.

Knows scikit-learn and the store. Importing the package loads neither scikit-learn nor torch. Where the reference's
examples run is told in `features`.
"""
