"""The report of an evaluation: every figure by its full name."""

from e4t_jax.creatures.judging.evaluation_report import flat, report


def test_nested_figures_are_named_by_their_path():
    metrics = {"identity_top1": 0.5, "any_style": {"identity_top1": 0.25, "attributes": {"ears": 1.0}}}
    assert dict(flat(metrics)) == {"identity_top1": 0.5, "any_style.identity_top1": 0.25, "any_style.attributes.ears": 1.0}


def test_the_report_tells_settings_prompts_and_figures():
    text = report({"domain": "creatures", "seed": 0}, ["a photo of *s", "*s in the snow"], {"sharpness": {"photo": 0.98765}})
    assert "domain creatures, seed 0" in text and "2. *s in the snow" in text and "| sharpness.photo | 0.9877 |" in text
