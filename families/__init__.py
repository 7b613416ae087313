"""The families of models, each behind the interface that model.py describes. Imports `common` alone."""
