// Draws the curves of a report with uPlot, and moves its slider. All data are in the page.
"use strict";
(() => {
  const {unit, charts} = JSON.parse(document.getElementById("data").textContent);
  const form = document.querySelector(".controls");
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const exact = value => value == null ? "–" : String(Number(value.toPrecision(5)));
  const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
  const brief = value => value == null ? "" :
    value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential().replace(/(\.\d\d?)\d*/, "$1") : compact.format(value);
  const plots = [];

  // The value to show of a curve at a step that another curve has: that of its nearest point, if it goes on there.
  function nearest(plot, series, index) {
    const [x, y] = [plot.data[0], plot.data[series]];
    if (series === 0 || y[index] != null) return index;
    let [before, after] = [index, index];
    while (before >= 0 && y[before] == null) before--;
    while (after < y.length && y[after] == null) after++;
    if (before < 0 || after >= y.length) return index;
    return x[index] - x[before] < x[after] - x[index] ? before : after;
  }

  // Which ticks of a logarithmic axis have a number: the fewer, the more decades there are.
  function numbered(plot, ticks) {
    const decades = Math.log10(plot.scales.y.max / plot.scales.y.min);
    const digits = decades < 0.6 ? "123456789" : decades < 1.3 ? "12357" : decades < 2.5 ? "125" : "1";
    return ticks.map(tick => digits.includes(Number(tick?.toExponential(3).split("e")[0])) ? tick : null);
  }

  // A limit of a logarithmic axis below the lowest value, at a tick.
  function below(value) {
    const power = 10 ** Math.floor(Math.log10(value));
    return Math.floor(value / power + 1e-9) * power;
  }

  function draw(plot) {
    const positive = plot.series.flatMap(({value}) => value.filter(one => one > 0));
    const [low, high] = positive.reduce(([low, high], one) => [Math.min(low, one), Math.max(high, one)], [Infinity, 0]);
    const logY = plot.log.checked && high > 1.5 * low; // within less, a logarithmic axis has no ticks
    const [by, logX] = [form.elements.x.value, form.elements.logx.checked];
    const ink = () => color("--soft"), grid = {stroke: () => color("--line"), width: 1};
    const tables = plot.series.map(({[by]: x, value}) => {
      const kept = x.map((_, i) => i).filter(i => !logX || x[i] > 0);
      return [kept.map(i => x[i]), kept.map(i => logY && !(value[i] > 0) ? null : value[i])];
    });
    plot.uplot?.destroy();
    const values = (_, ticks) => ticks.map(brief);
    const axis = {stroke: ink, grid, ticks: grid, font: "12px system-ui, sans-serif", values};
    plot.uplot = new uPlot({
      width: plot.box.clientWidth,
      height: 240,
      scales: {
        x: {time: false, distr: logX ? 3 : 1},
        y: logY ? {distr: 3, range: (_, low, high) => [below(low), high * 1.1]} : {},
      },
      axes: [axis, {...axis, size: 58, ...(logY ? {filter: numbered} : {})}],
      cursor: {
        dataIdx: nearest,
        sync: {key: "report", setSeries: false},
        points: {size: 7, fill: (one, i) => one.series[i].stroke(one, i)},
      },
      legend: {markers: {dash: (one, i) => one.series[i].dash ? "dashed" : "solid"}},
      series: [
        {label: by === "step" ? "step" : unit, value: (_, value) => exact(value)},
        ...plot.series.map(({run, label, dashed}) => ({
          label,
          stroke: () => color(`--run-${run % 8}`),
          width: dashed ? 1.2 : 1.8,
          points: {fill: () => color("--paper")},
          dash: dashed ? [5, 4] : undefined,
          show: form.querySelector(`.shown[value="${run}"]`).checked,
          value: (_, value) => exact(value),
        })),
      ],
    }, uPlot.join(tables), plot.box);
  }

  const drawn = () => plots.filter(plot => plot.uplot);
  const redraw = () => drawn().forEach(draw);
  const fit = ({target}) => {
    const [plot, width] = [plots[target.dataset.chart], target.clientWidth];
    if (width > 0 && !plot.uplot) draw(plot); // those behind a disclosure, once it is opened
    else if (width > 0 && width !== plot.uplot.width) plot.uplot.setSize({width, height: plot.uplot.height});
  };
  const resized = new ResizeObserver(entries => setTimeout(() => entries.forEach(fit)));
  for (const box of document.querySelectorAll(".plot")) {
    const log = box.parentElement.querySelector(".log");
    const plot = plots[box.dataset.chart] = {box, log, series: charts[box.dataset.chart]};
    log.addEventListener("change", () => draw(plot));
    fit({target: box});
    resized.observe(box);
  }
  form?.addEventListener("change", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (const [event, on] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => { document.documentElement.classList.toggle("printing", on); redraw(); });
  }

  const slider = document.getElementById("step");
  if (slider) {
    const steps = JSON.parse(slider.dataset.steps);
    const show = () => {
      const step = steps[slider.value];
      slider.nextElementSibling.textContent = `step ${step.toLocaleString("en")}`;
      for (const figure of document.querySelectorAll(".grid")) {
        const images = [...figure.querySelectorAll("img")];
        const shown = images.filter(image => image.dataset.step <= step).pop() ?? images[0];
        for (const image of images) image.hidden = image !== shown;
        figure.querySelector("output").textContent = `step ${Number(shown.dataset.step).toLocaleString("en")}`;
      }
    };
    slider.addEventListener("input", show);
    show();
  }
})();
