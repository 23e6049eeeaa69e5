"""Commands of the documentation that `make docs-check` does not run, one by one, and why. What is here and no longer there fails."""

IN_CI = ".ci/run runs it"
LONG = "takes minutes to hours on a quiet machine"
CLUSTER = "starts a Ray cluster on fixed ports; tests/test_local_cluster.py and tests/end_to_end/test_jobs.py run it"
NEEDS_CENSUS = "needs data/census, of raw files that nobody may pass on; benchmarks/results/tune_census.md is what came out"
RAW_FILES = "needs raw files that nobody may pass on; tests/test_prepare.py runs it on files of their form"

EXCUSED = {
    "make test": IN_CI,
    "make lint": IN_CI,
    "make docs-check": "this is it",
    "make docs-check SHARD=3/24": "this is it",
    ".ci/run": "it runs this",
    "make test-slow": LONG,
    "make peers": "installs other packages into a venv of their own",
    "make bench": LONG,
    "make bench-check": LONG,
    "make bench-heads": LONG,
    "make bench-weighting": LONG,
    "make bench-sizes": LONG,
    "launch/local_cluster.sh start 2 1": CLUSTER,
    "launch/submit.sh my.yaml --workers 2 run.dir=/shared/runs/mine": CLUSTER,
    "launch/local_cluster.sh stop": CLUSTER,
    "launch/local_cluster.sh kill 2": CLUSTER,
    "NETNS=a launch/local_cluster.sh start": "needs root and network namespaces; tests/test_local_cluster.py runs it where there are",
    "ray start --head --metrics-export-port=8080": CLUSTER,
    "pip install 'distmtl[mlflow]' 'distmtl[wandb]'": "is for who has distmtl from a package index",
    "kubectl apply -f launch/kuberay/rayjob.yaml": "needs a Kubernetes cluster; tests/test_launch.py reads the file",
    "distmtl prepare census-income --source ~/census --out data/census": RAW_FILES,
    "distmtl tune configs/tuning/census.yaml": NEEDS_CENSUS,
    "distmtl train tunes/census/best.yaml": NEEDS_CENSUS,
}
