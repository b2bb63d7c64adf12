"""Raters at the page: a browser driven by its keyboard, and the whole loop from an answer to the next champion."""
