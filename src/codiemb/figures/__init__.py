"""HTML and SVG by elements: figures of a page, and figures in files of their own. Imports no torch."""
