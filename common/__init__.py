"""What the steps share: files, arguments, ranks, training, saving, foils, statistics. Imports no other room."""
