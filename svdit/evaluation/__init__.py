"""Quality metrics of generated images, with error bars: images → features → statistics → metrics → report."""
