"""Tools that know nothing of language models: files, storage, errors, processes."""
