"""From images to a Parquet store of embeddings: sources, decoding, frozen backbones, extraction, storage.

Knows torch and Parquet and nothing of scikit-learn. Importing the package loads neither.

Examples in the reference run in a folder with 24 drawn images in ``photos``, three colours in two splits, a table of
them, ``photos.csv``, the ``store`` that is filled from them, and a ``bundle`` that is trained on it.
"""
