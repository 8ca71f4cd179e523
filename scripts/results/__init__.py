"""The results page: run recipes over seeds, time their files, write `recipes/RESULTS.md`.

scripts/results/make run RECIPE... --seeds 0 1 2 --processes 2   one `sqat run` for each seed that is not done
scripts/results/make status [RECIPE...]                          which seeds are done, running or missing
scripts/results/make latency RECIPE...                           time the exported files of one seed
scripts/results/make page                                        write recipes/results.json and RESULTS.md
scripts/results/make tried RUN --recipe RECIPE --verdict TEXT    add a run to the log of tries
"""

# No figure of the page is typed: `collecting` reads the runs, `timing` measures, `page` renders `schema.ResultsFile`.
