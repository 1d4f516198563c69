"""The command line. Every command reads and writes one folder; a result that is there is never replaced."""
