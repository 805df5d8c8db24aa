"""The one loop. Pretraining, distillation and mutual learning differ in streams and coefficients alone.

N tokens, S students, R streams.
"""

from contextlib import ExitStack

from engine.checks import check
from engine.cohort import Cohort
from engine.config import Config
from engine.data import IGNORED, Step
from engine.objective import Coefficients, Tally
from engine.run import Run
from engine.runtime import StopSignal, start
from engine.teachers import NO_TEACHERS, Teachers
from kernels import linear_ensemble_kl


def train(config: Config) -> None:
    """Train the students of `config`, or go on where the run of that name stopped.

    Raises ValueError for whatever a user can mend, before anything is written where that can be known before.
    """
    runtime = start()
    check(config)
    stop = StopSignal()
    with ExitStack() as stack:
        run = Run(config, runtime, stack)
        objective = run.weigh(run.outer.weights)
        for step in run.profiled(run.teachers.ahead(run.data.steps(run.state.step + 1, run.steps))):
            run.outer.before_step(step, run.cohort)
            tally = accumulate(run.cohort, step, objective, run.teachers)
            outcome = run.cohort.step(tally.losses_S, tally.ce_S, run.learning_rates(step), stop=bool(stop))
            if run.outer.after_step(step, run.cohort, run.outer_data, skipped=bool(outcome.bad)):
                objective = run.weigh(run.outer.weights)
            run.record(step, tally, outcome)  # logs; evaluates and saves where due
            if outcome.stop:
                run.pause()
                return
        run.finish()


def accumulate(cohort: Cohort, step: Step, objective: Coefficients, teachers: Teachers = NO_TEACHERS) -> Tally:
    """Every student's gradient of its loss over the step's micro-batches: S forwards, one loss, S backwards."""
    tally = Tally(len(cohort), step.micro_batches[0].targets_N.device)
    for batch in step.micro_batches:
        hidden = [student.body(batch) for student in cohort]
        with cohort.heads():  # gathered under ZeRO 3
            streams = [student.project(hidden_ND) for student, hidden_ND in zip(cohort, hidden, strict=True)]
            result = linear_ensemble_kl(
                streams,
                teachers(batch),
                batch.targets_N,
                normalizer=step.valid_tokens,
                kl_mask=batch.kl_mask_N,
                ignore_index=IGNORED,
                **vars(objective),
            )
            for student, loss in zip(cohort, result.losses, strict=True):
                student.backward(loss, last=batch is step.micro_batches[-1])
        tally.add(result)
    return tally
