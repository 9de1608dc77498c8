"""Where sparse teachers come from."""
