"""Catalogues: one module a language, with STRINGS = {English template: its template}."""
