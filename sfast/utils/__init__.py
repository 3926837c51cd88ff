"""Only the import paths under `sfast.utils` that stable-fast's README uses; nothing of sfast lives here."""
