"""Expert packages: format, validation, signatures, and the modules of an expert."""
