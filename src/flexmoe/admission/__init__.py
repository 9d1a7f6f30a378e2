"""Admission: adding contributed experts to a model, and the checks that they pass before."""
