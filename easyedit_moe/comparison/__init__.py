"""Methods side by side: the same records, one restored model, one table."""
