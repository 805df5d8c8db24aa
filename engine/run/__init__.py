"""One run's life: settings checked, begun or resumed, recorded, evaluated and saved where due, and finished."""
