"""The results page: run recipes over seeds, time what they export, write `recipes/RESULTS.md` from the runs' own JSON.

    scripts/results run RECIPE... --seeds 0 1 2 --processes 2   one `sqat run` a seed; what is done is not done again
    scripts/results status [RECIPE...]                          which seed of which recipe is done, running or missing
    scripts/results latency RECIPE...                           time the exported files of one seed against each other
    scripts/results page                                        write recipes/results.json, and RESULTS.md from it
    scripts/results tried RUN --recipe RECIPE --verdict TEXT    add a finished run to the log of what was tried

No figure on the page is typed by hand: `collecting` reads the runs (`results.json` and manifests), `timing` measures;
both fill `schema.ResultsFile`, and `page` is a function of that file and of the log alone. Left out: charts, and any
figure of hardware that the runs were not made on.
"""
