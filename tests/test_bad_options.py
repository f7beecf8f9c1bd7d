"""Commands refuse options that they cannot use: status 2, one line that says which and what to do, nothing written.

One line of a table is one case; further ones stand beside what they are about, in the other tests.
"""

import pytest

from tests.refusals import PROGRAMS, Line, check_line

pytestmark = pytest.mark.slow

HERE = "--backbone {vlm} --data {data}"
SMALL = f"{HERE} --total-queries 4 --validate-queries 2 --test-queries 2 --out run"
"""Of trainings: small enough to reach their end, should they not refuse."""

EVERY_NUMBER = [
    ("nan", "must be a finite number"),
    ("inf", "must be a finite number"),
    ("-inf", "must be a finite number"),
    ("half", "half"),
    ("", "''"),
]

TRAININGS = [
    # numbers that are none, in every option that takes one
    *(
        Line(f"{program} {SMALL} --learning-rate={value}", words)
        for program in ("train_rl", "train_gumbel")
        for value, words in EVERY_NUMBER
    ),
    *(
        Line(f"train_rl {SMALL} {option} nan", f"{option} is nan; it must be a finite number")
        for option in ("--clip-range", "--entropy", "--initial-spread", "--tune-rate")
    ),
    *(
        Line(f"train_gumbel {SMALL} {option} inf", f"{option} is inf; it must be a finite number")
        for option in ("--noise", "--cost-weight", "--warm-up", "--distillation")
    ),
    Line(f"train_gumbel {SMALL} --temperatures 1 nan", "--temperatures is nan"),
    *(
        Line(f"{program} {SMALL} --seed {seed}", f"--seed is {seed}; a seed must be at least 0, and below 2^32")
        for program in ("train_rl", "train_gumbel")
        for seed in (-1, 2**32, 10**30)
    ),
    *(
        Line(f"{program} {SMALL} --{option} {value}", f"--{option} is {value}; it must be at least 1")
        for program in ("train_rl", "train_gumbel")
        for option, value in (
            ("test-queries", 0),
            ("validate-every", 0),
            ("validate-queries", -1),
            ("checkpoint-every", 0),
            ("width", 0),
            ("batch-size", 0),
        )
    ),
    *(
        Line(f"train_rl {SMALL} --{option} 0", f"--{option} is 0; it must be at least 1")
        for option in ("envs", "rollout-steps", "plans-per-query", "epochs")
    ),
    # budgets
    *(
        Line(f"{program} {SMALL} --budgets {given}", words)
        for program in ("train_rl", "train_gumbel")
        for given, words in (
            ("0.5", "'--budgets'. Expected 2 values"),
            ("0.2 0.5 1", "Unrecognized options: 1"),
            ("-0.5 1", "budgets are (-0.5, 1.0)"),
            ("1 0.5", "budgets are (1.0, 0.5)"),
            ("nan 1", "--budgets is nan"),
            ("low high", "low"),
            ("0.5,1.0 1", "0.5,1.0"),
        )
    ),
    *(
        Line(f"train_rl {SMALL} --test-budgets {given}", words)
        for given, words in (
            ("", "no budget given"),
            ("0", "budget 0 is outside"),
            ("-1", "budget -1 is outside"),
            ("50%", "50%"),
            ("1e-9", "--test-budgets 1e-09 can never be met; the least budget here is 0."),
        )
    ),
    # words
    *(
        Line(f"train_rl {SMALL} {given}", words)
        for given, words in (
            ("--axes tokens depth", "the axes are tokens, depth; they must be some of"),
            ("--axes", "the axes are none"),
            ("--rule fit", "'fit'"),
            ("--ratios all", "'all'"),
            ("--algo trpo", "'trpo'"),
            ("--dtype int8", "'int8'"),
            ("--device tpu", "'tpu'"),
            ("--positions kept", "'kept'"),
            ("--tune-backbone half", "'half'"),
            ("--no-such-option 1", "--no-such-option"),
            ("leftover", "leftover"),
            ("--workers -1", "--workers is -1; it must be at least 0"),
            ("--reward", "no reward given"),
            ("--reward accuracy*2", "weight 'accuracy'"),
            ("--reward accuracy+flops", "unknown reward 'accuracy+flops'"),
            ("--reward nan*accuracy", "weight 'nan'"),
            ("--reward inf*flops", "weight 'inf'"),
            ("--reward :", "reward ':' cannot be imported"),
            ("--reward os:", "reward 'os:' cannot be imported"),
            ("--reward :accuracy", "cannot be imported"),
            ("--reward-seconds -1", "--reward-seconds is -1.0; give a number of seconds, or 0"),
            ("--reward-seconds nan", "--reward-seconds is nan"),
            ("--reward-seconds inf", "--reward-seconds is inf"),
            ("--reward-seconds long", "'long'"),
            ("--reward latency", "--reward latency needs --latency-model FILE"),
            ("--latency-model {desk}/text.json", "text.json"),
            ("--initial-plan {desk}/other-plan.json", "is for (tokens, layers, heads) = (64, 6, 4)"),
            ("--initial-plan {desk}/order.json", "no readable plan"),
            ("--initial-plan nowhere.json", "no readable plan in 'nowhere.json'"),
            ("--init-from {mine}", "no readable controller"),
            ("--init-from {run} --width 8", "give --width 48"),
            ("--init-from {run} --rule threshold", "give --rule fill"),
            ("--data {data} --split dev", "--split"),
            ("--seed", "--seed"),
            ("--envs 8 --plans-per-query 3", "8 environments do not divide into groups of 3"),
        )
    ),
    *(
        Line(f"train_gumbel {SMALL} {given}", words)
        for given, words in (
            ("--estimator reinforce", "'reinforce'"),
            ("--temperatures 0 1", "temperatures"),
            ("--temperatures 1", "instantiated from ['1']"),
            ("--cost lots", "'lots'"),
            ("--cost-weight -1", "cost"),
            ("--warm-up 2", "warm"),
            ("--distillation -1", "distillation"),
            ("--noise -1", "noise"),
            ("--estimator adallava-l --prefix-layers 9", "9"),
            ("--estimator adallava-h --head-group 3", "3"),
            ("--estimator adallava-l --axes layers", "--axes has no effect on adallava-l"),
            ("--estimator soft-topk --rule threshold", "--rule threshold has no effect"),
        )
    ),
    # a place to write to
    *(
        Line(f"{program} {HERE} --out {out}", words)
        for program in ("train_rl", "train_gumbel", "train_backbone")
        for out, words in (
            ("{mine}", "exists and is not a run folder; choose another --out"),
            ("{desk}/empty", "is a file; choose another --out"),
            ("{desk}/empty/run", "'{desk}/empty' is a file"),
            ("{desk}/empty/deep/run", "'{desk}/empty' is a file"),
            ("{run}", "holds a run already; add --resume"),
            ("x" * 300, "File name too long"),
            ("/proc/run", "cannot be"),
        )
    ),
    Line(f"train_rl {HERE} --out {{run}} --resume --width 8", "was begun with width=48, now 8"),
    # files of options
    *(
        Line(f"train_rl {SMALL} --config {{desk}}/{file}", words)
        for file, words in (
            ("empty.yaml", "must hold a mapping of options"),
            ("list.yaml", "must hold a mapping of options"),
            ("deep.yaml", "nested too deeply"),
            ("bomb.yaml", "has YAML aliases"),
            ("bomb-in-option.yaml", "has YAML aliases"),
            ("tab.yaml", "not readable YAML"),
            ("python.yaml", "not readable YAML"),
            ("date.yaml", "not readable YAML"),
            ("key.yaml", "not readable YAML"),
            ("alias.yaml", "has YAML aliases"),
            ("null.yaml", "not readable YAML"),
            ("latin.yaml", "not readable YAML"),
            ("number-key.yaml", "unknown option 1"),
            ("seed-text.yaml", "has seed: 'one'"),
            ("seed-none.yaml", "has seed: None"),
            ("seed-float.yaml", "has seed: 1.5"),
            ("seed-list.yaml", "has seed: [1, 2]"),
            ("fit-number.yaml", "has fit: 3"),
            ("fit-text.yaml", "has fit: 'no'"),
            ("one-budget.yaml", "has budgets: 0.5"),
            ("three-budgets.yaml", "has budgets: [0.1, 0.5, 1.0]"),
            ("budgets-text.yaml", "has budgets: ['low', 'high']"),
            ("mapping.yaml", "a mapping or nested lists as reward"),
            ("infinite.yaml", "learning-rate is inf"),
            ("dashed.yaml", "has reward: ['accuracy', '--seed']"),
            ("spelling.yaml", "unknown option 'total-queries'; known"),
        )
    ),
    Line(f"train_rl {SMALL} --config {{desk}}", "is no regular file"),
    Line(f"train_rl {SMALL} --config", "--config needs the path"),
]

BACKBONE = [
    *(
        Line(f"train_backbone --data {{data}} --out run {given}", words)
        for given, words in (
            ("--steps 0", "--steps is 0; it must be at least 1"),
            ("--learning-rate nan", "--learning-rate is nan"),
            ("--learning-rate 0", "it must be a positive number"),
            ("--plain-share 2", "between 0 and 1"),
            ("--plain-share nan", "--plain-share is nan"),
            ("--budgets 0 1", "--budgets are (0.0, 1.0)"),
            ("--muon-rate -1", "--muon-rate is -1"),
            ("--lora-rank 4", "--lora-rank needs a trained model"),
            ("--lora-rank -1 --backbone {vlm}", "--lora-rank is -1"),
            ("--merge", "--merge"),
            ("--seed -1", "a seed must be at least 0"),
            ("--warmup -1", "--warmup is -1"),
            ("--vision-steps -1", "--vision-steps is -1"),
            ("--images 0", "--images is 0"),
            ("--questions 2 --elastic-questions 3", "at most --questions (2)"),
            ("--backbone nobody", "unknown backbone 'nobody'"),
            ("--backbone {mine}", "could not be read"),
            ("--dtype int8", "'int8'"),
            ("--validate-every 0", "--validate-every is 0"),
        )
    ),
    Line("train_backbone --data nothing --out run", "unknown data 'nothing'"),
]

COMMANDS = [
    Line("eval", "Expected one of {{run, latency"),
    Line("eval evaluate", "evaluate"),
    *(
        Line(f"eval run full {HERE} {given}", words)
        for given, words in (
            ("--budgets", "no budget given"),
            ("--budgets nan", "--budgets is nan"),
            ("--budgets 0.5 inf", "--budgets is inf"),
            ("--budgets half", "half"),
            ("--keep 0", "share of 0"),
            ("--keep 0.5 --milliseconds 1", "both stand in place of --budgets"),
            ("--limit -1", "limit is -1"),
            ("--limit 1.5", "1.5"),
            ("--max-new-tokens 0", "--max-new-tokens is 0"),
            ("--seed -1", "--seed is -1"),
            ("--timing x", "x"),
            ("--json {desk}/empty/records.json", "'{desk}/empty' is a file"),
            ("--plot {mine}", "is a folder"),
            ("--json {mine}/no/such.json", "has no folder"),
            ("--latency-model {desk}/latency.json", "serves --milliseconds"),
            ("--backbone {mine}", "could not be read"),
            ("--backbone ./nowhere", "could not be read"),
            ("--split valid", "split is 'valid'"),
            ("--device tpu", "'tpu'"),
            ("--positions middle", "'middle'"),
        )
    ),
    *(
        Line(f"eval run random {HERE} --milliseconds {given}", words)
        for given, words in (
            ("nan --latency-model {desk}/latency.json", "--milliseconds is nan"),
            ("-1 --latency-model {desk}/latency.json", "a budget of -1 ms is no time"),
            ("1 --latency-model {desk}/deep.json", "nested too deeply"),
            ("1 --latency-model {desk}/huge.json", "no readable latency model"),
            ("1 --latency-model {desk}/nan.json", "no readable latency model"),
            ("1 --latency-model {desk}/list.json", "no readable latency model"),
            ("1 --latency-model {desk}/latin.json", "no readable latency model"),
            ("1 --latency-model {desk}", "no readable latency model"),
        )
    ),
    *(
        Line(f"eval run {policy} {HERE} --budgets 0.9", words)
        for policy, words in (
            ("full@0", "does not choose visual tokens by count"),
            ("divprune@0", "a share of 0"),
            ("divprune@2", "a share of 2"),
            ("prumerge@", "unknown policy 'prumerge@'"),
            ("fastv:k", "has no option 'k'"),
            ("fastv:k=", "has no option 'k='"),
            ("fastv:k=x", "has no option 'k=x'"),
            ("fastv:k=²", "has no option 'k=²'"),
            ("fastv:k=99", "99"),
            ("fastv:r=nan", "nan"),
            ("fastv:r=2", "2"),
            ("fastv:k=1,k=2", "k=2"),
            ("fastv:backbone=1", "has no option 'backbone=1'"),
            ("static:plan={desk}/text.json", "no readable plan"),
            ("static:plan={desk}/other-plan.json", "is for (tokens, layers, heads) = (64, 6, 4)"),
            ("static:plan={desk}/order.json", "no readable plan"),
            ("random@original@merge@renumbered", "asks for positions original and renumbered"),
            ("~then~random", "unknown policy ''"),
            ("prumerge~then~", "unknown policy ''"),
            ("prumerge~then~random~then~random", "must set its own number of tokens"),
            ("random~then~random", "must set its own number of tokens"),
            ("{mine}", "is neither a run folder"),
            ("{data}", "is neither a run folder"),
            ("os:getcwd", "os:getcwd"),
            ("os:nothing", "cannot be imported"),
            ("nowhere:f:a=1", "cannot be imported"),
            (":", "unknown policy ':'"),
            ("builtins:int", "builtins:int"),
        )
    ),
    *(
        Line(f"eval latency full {HERE} {given}", words)
        for given, words in (
            ("--budgets nan", "--budgets is nan"),
            ("--repeats -1", "--repeats is -1"),
            ("--out {desk}/empty/l.json", "'{desk}/empty' is a file"),
            ("--split x", "split is 'x'"),
        )
    ),
    *(
        Line(f"eval question-only --data {{data}} {given}", words)
        for given, words in (
            ("--limit 0", "limit is 0"),
            ("--split dev", "split is 'dev'"),
            ("--seed -1", "--seed is -1"),
            ("--json nowhere/a.json", "nowhere"),
            ("--data nothing", "unknown data 'nothing'"),
        )
    ),
    *(
        Line(f"eval elasticity {HERE} {given}", words)
        for given, words in (
            ("--plans 0", "--plans is 0"),
            ("--oracle-queries 0", "--oracle-queries is 0"),
            ("--limit 0", "limit is 0"),
            ("--json {mine}", "is a folder"),
            ("--seed -5", "--seed is -5"),
        )
    ),
    *(
        Line(f"eval gradients {given}", words)
        for given, words in (
            ("--samples 7", "--samples 7 must be a multiple of 4"),
            ("--temperatures 0", "above 0"),
            ("--temperatures nan", "--temperatures is nan"),
            ("--samples", "--samples"),
            ("--seed -1", "--seed is -1"),
        )
    ),
    *(
        Line(f"eval bench {HERE} {given}", words)
        for given, words in (
            ("--parts disk", "'disk'"),
            ("--shape huge", "'huge'"),
            ("--json {mine}", "is a folder"),
            ("--parts", "--parts"),
        )
    ),
    *(
        Line(f"eval gpu --device cpu {given}", words)
        for given, words in (
            ("--out gpu --seconds 0", "--seconds is 0"),
            ("--out gpu --seconds nan", "--seconds is nan"),
            ("--out {desk}/empty/gpu", "'{desk}/empty' is a file"),
            ("--device tpu", "tpu"),
        )
    ),
    *(
        Line(f"eval search-static {HERE} --out static.json {given}", words)
        for given, words in (
            ("--queries 0", "--queries is 0"),
            ("--tries 0", "--tries is 0"),
            ("--token-groups -1", "--token-groups is -1"),
            ("--split x", "split is 'x'"),
            ("--out {mine}", "is a folder"),
        )
    ),
    Line("eval search-static", "--out"),
    *(
        Line(f"eval tune {HERE} {given}", words)
        for given, words in (
            ("--grid {desk}/grid-empty.txt", "has no settings"),
            ("--grid nowhere.txt", "cannot be read"),
            ("--grid {desk}/grid-latin.txt", "cannot be read"),
            ("--grid {desk}", "cannot be read"),
            ("--grid {desk}/grid-unknown.txt", "fastw"),
            ("nobody", "nobody"),
            ("full --limit 0", "limit is 0"),
            ("full --keep 2", "a share of 2"),
            ("full --budgets 2", "budget 2 is outside"),
        )
    ),
    *(
        Line(f"eval experiment training {HERE} {given}", words)
        for given, words in (
            ("--out {mine}", "holds something that is no experiment"),
            ("--out {desk}/empty", "is a file; name a folder"),
            ("--out {desk}/empty/x", "'{desk}/empty' is a file"),
            ("--out x --seeds", "--seeds"),
            ("--out x --seeds 1 1", "each once"),
            ("--out x --seeds -1", "--seeds is -1"),
            ("--out x --budgets 0.5", "give two or more"),
            ("--out x --budgets nan 1", "--budgets is nan"),
            ("--out x --test-queries 0", "--test-queries is 0"),
            ("--out x --timing -1", "--timing is -1"),
            ("--out x --jobs 0", "--jobs is 0"),
            ("--out x --arms nothing", "--arms has 'nothing'"),
            ("--out x --data nothing", "unknown data 'nothing'"),
            ("--out x --backbone nothing", "unknown backbone 'nothing'"),
            ("", "--out"),
        )
    ),
    Line("eval experiment all --out x", "'all'"),
    *(
        Line(f"eval audit random {HERE} {given}", words)
        for given, words in (
            ("--plans -1", "--plans is -1"),
            ("--limit 0", "limit is 0"),
            ("--budgets", "no budget given"),
            ("--static nothing", "unknown policy 'nothing'"),
            ("--split x", "split is 'x'"),
        )
    ),
    Line(f"eval audit full {HERE}", "does not follow budgets"),
    Line("eval audit", "Missing"),
    *(
        Line(f"eval demo even {HERE} {given}", words)
        for given, words in (
            ("--port 0", "--port is 0"),
            ("--port 99999", "--port is 99999"),
            ("--host nowhere.invalid", "cannot listen on nowhere.invalid"),
            ("--queries 0", "--queries is 0"),
            ("--max-new-tokens 0", "--max-new-tokens is 0"),
            ("--upload-megabytes 0", "--upload-megabytes is 0"),
            ("--upload-megapixels nan", "--upload-megapixels is nan"),
            ("--seed -1", "--seed is -1"),
        )
    ),
    *(
        Line(f"eval scale-out {HERE} {given}", words)
        for given, words in (
            ("--workers", "--workers is"),
            ("--workers 0", "--workers is 0"),
            ("--slower 0", "--slower 0 must be above 0"),
            ("--slower nan", "--slower is nan"),
            ("--transfer-ms -1", "--transfer-ms -1"),
            ("--rows 0", "--rows is 0"),
            ("--steps x", "x"),
        )
    ),
]

TABLE = [*TRAININGS, *BACKBONE, *COMMANDS]


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.command.replace(SMALL, "...").replace(HERE, "..."))
def test_bad_options(line, monkeypatch, capsys, desk):
    check_line(line, monkeypatch, capsys, desk["place"], desk)


def test_every_command_has_its_table():
    """A command that is added is in here, too."""
    import maskgym.eval.__main__ as eval_main

    names = {arm.__metadata__[0].name for arm in eval_main.Command.__args__}
    asked = {line.command.split()[1] for line in COMMANDS if len(line.command.split()) > 1}
    assert names <= asked and {line.command.split()[0] for line in TABLE} == set(PROGRAMS)
