"""How good are generated images, and how sure is that: images → features → statistics → metrics → report."""
