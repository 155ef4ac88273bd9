"""Comparing methods: plans, their runs side by side, tables and a report. Nothing heavy is imported from here."""
