"""The stages, each an artifact that its job or command makes:

    scans -> manifest -> crops -> clusterers -> labels -> pretrain --.
                     \\-> split -> cases ------------------------------> finetune -> evaluation -> registry, predictions
                                                                             \\-> postprocess -> the same

A stage is addressed by what it is made of: its config and its parents' fingerprints. Where its ``manifest.json``
lies it is finished and returns at once; where it does not, it goes on with what an interrupted run left. So the
same command twice computes nothing twice, and a sweep's trials share everything upstream of what they vary.
"""

# ruff: noqa: F401
from logonet.pipelines.evaluation import Evaluation, evaluate_model, scores_of
from logonet.pipelines.finetuning import Finetuning, finetune, resolve_finetuning
from logonet.pipelines.postprocessing import postprocess
from logonet.pipelines.prediction import predict_bucket
from logonet.pipelines.preparation import import_scans, make_clusterers, make_crops, open_manifest
from logonet.pipelines.pretraining import Pretraining, pretrain, resolve, upstream
from logonet.pipelines.registration import register
from logonet.pipelines.stage import Trial
from logonet.pipelines.study import Study, StudyRun, plan_study, run_study
