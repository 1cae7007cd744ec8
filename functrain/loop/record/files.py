"""The names of the files of a record, and the number of their format."""

FORMAT = 1
RUN, RESULTS, RESULTS_FOLDER, SOURCE = "run.json", "results.json", "results", "source.tar.gz"
REPORTS = ("report.html", "report.md")
FILES = (RUN, RESULTS, f"{RESULTS_FOLDER}/*", "source*.tar.gz", *REPORTS)
