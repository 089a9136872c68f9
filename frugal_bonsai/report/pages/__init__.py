"""The pages of `report`: sections of tables and figures, as HTML, Markdown or JSON."""
