"""The rules: one file a subject, checks first and repairs after them; `table` lists every rule."""
