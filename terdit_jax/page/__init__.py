"""The page of a report: what runs have left in their workdirs, as curves, pictures and tables of one HTML file."""
