"""Looking afterwards: commands that read what a run has left. Imports anything below it; nothing imports it."""
