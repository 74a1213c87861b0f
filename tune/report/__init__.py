"""The report of a search: page, figures, and importance of the keys."""
