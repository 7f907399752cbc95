"""One module per family: BUILDERS maps names of key tables (shared/keys/<name>.json) to functions that build the module."""
