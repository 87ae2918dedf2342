"""How good a generator is: its card, who judges it, what is measured, the picture."""
