"""The results page: run recipes over seeds, time what they export, write `recipes/RESULTS.md` from the runs' own JSON.

    scripts/results/make run RECIPE... --seeds 0 1 2 --processes 2   one `sqat run` for each seed that is not done
    scripts/results/make status [RECIPE...]                          which seed of which recipe is done or missing
    scripts/results/make latency RECIPE...                           time the exported files of one seed
    scripts/results/make page                                        write recipes/results.json and RESULTS.md
    scripts/results/make tried RUN --recipe RECIPE --verdict TEXT    log a run that was tried

No figure on the page is typed by hand: `collecting` reads the runs (`results.json` and manifests), `timing` measures;
both fill `schema.ResultsFile`, and `page` is a function of that file and of the log alone. Left out: charts, and any
figure of hardware that the runs were not made on.
"""
