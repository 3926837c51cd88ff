"""The import paths that users of stable-fast already have: their scripts run unchanged, on sfast's compiler."""
