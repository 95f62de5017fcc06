"""From images to a Parquet store of embeddings: sources, decoding, frozen backbones, extraction, storage.

Knows torch and Parquet and nothing of scikit-learn. Importing the package loads neither.
"""
