"""The report of a quantized model: measurements of its layers, tables, figures."""
