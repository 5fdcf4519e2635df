"""The report: one document, shown as HTML, in the terminal and as a checklist."""
