"""Recipes: make the data, train and measure a draft. Not part of the installed package."""
