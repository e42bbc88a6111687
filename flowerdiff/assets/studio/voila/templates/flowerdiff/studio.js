// What ipywidgets leave out: names and roles for screen readers, keys, dropped files, links, and a kernel that is gone.
(() => {
  const ROLES = {
    '.fd-head': { role: 'banner' }, '.fd-content': { role: 'main' },
    '.fd-tabs .fd-chips': { role: 'tablist', 'aria-label': 'Tabs' },
    '.fd-request': { role: 'region', 'aria-label': 'What to draw' },
    '.fd-controls': { role: 'region', 'aria-label': 'How to draw' },
    '.fd-right': { role: 'region', 'aria-label': 'Results' },
  };
  const set = (e, name, value) => { if (e.getAttribute(name) !== value) e.setAttribute(name, value); };
  const text = e => e?.textContent.trim() || '';

  // Names of sliders and progress bars, and the state of buttons that stay pressed.
  const describe = () => {
    for (const [selector, attributes] of Object.entries(ROLES))
      for (const e of document.querySelectorAll(selector))
        for (const [name, value] of Object.entries(attributes)) set(e, name, value);
    for (const e of document.querySelectorAll('.fd [role=slider]')) {
      const slider = e.closest('.widget-slider, .jupyter-widget-slider, .widget-hslider, .jupyter-widget-hslider');
      const name = text(slider?.querySelector('.widget-label, .jupyter-widget-label'));
      if (name) set(e, 'aria-label', name);
      const readout = text(slider?.querySelector('.widget-readout, .jupyter-widget-readout'));
      if (readout) set(e, 'aria-valuetext', readout);
    }
    for (const e of document.querySelectorAll('.fd .widget-readout, .fd .jupyter-widget-readout')) {
      if (e.isContentEditable) {
        set(e, 'role', 'textbox');
        set(e, 'aria-label', text(e.parentElement.querySelector('.widget-label, .jupyter-widget-label')) + ', value');
      }
    }
    for (const e of document.querySelectorAll('.fd-open'))  // ipywidgets count the files, which are taken at once
      for (const part of e.childNodes) if (part.nodeType == 3 && /\(\d+\)/.test(part.data)) part.data = part.data.replace(/ ?\(\d+\)/, '');
    for (const e of document.querySelectorAll('.fd-history select')) set(e, 'aria-label', 'Earlier prompts');
    for (const e of document.querySelectorAll('.fd .progress-bar')) { set(e, 'role', 'progressbar'); set(e, 'aria-label', 'Progress'); }
    for (const e of document.querySelectorAll('.fd button.jupyter-toggle-button, .fd button.widget-toggle-button')) {
      const active = String(e.classList.contains('mod-active'));
      const isTab = e.closest('.fd-tabs');
      set(e, isTab ? 'aria-selected' : 'aria-pressed', active);
      if (isTab) set(e, 'role', 'tab');
      if (e.classList.contains('fd-star')) set(e, 'aria-label', 'Favorite');
    }
  };
  let planned = 0;
  const plan = () => { planned ||= requestAnimationFrame(() => { planned = 0; describe(); }); };
  new MutationObserver(plan).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ['class'], characterData: true });

  // Ctrl+Enter generates. The field is left first: that sends what was typed.
  const generate = () => {
    const field = document.activeElement;
    field?.blur();
    [...document.querySelectorAll('.fd-generate')].find(e => e.offsetParent)?.click();
    field?.focus();
  };
  document.addEventListener('keydown', event => {
    if (event.key == 'Enter' && (event.ctrlKey || event.metaKey) && event.target.closest?.('.fd')) { event.preventDefault(); generate(); }
    if (event.key == 'Escape') for (const e of document.querySelectorAll('.fd-image[open]')) e.open = false;
    const tab = event.target.closest?.('[role=tab]');
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (tab && step) {
      const tabs = [...tab.closest('[role=tablist]').querySelectorAll('[role=tab]')];
      tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length].focus();
    }
  }, true);  // text fields of ipywidgets stop the event

  // Words are sent after a pause in typing, too: a reload keeps them.
  let pause;
  document.addEventListener('input', event => {
    const field = event.target;
    if (!field.matches?.('.fd textarea, .fd input[type=text]')) return;
    clearTimeout(pause);
    pause = setTimeout(() => field.dispatchEvent(new Event('change', { bubbles: true })), 700);
  });

  // A file that is dropped goes to the button that opens a picture; its input is not part of the page.
  const open = files => {
    const click = HTMLInputElement.prototype.click;
    HTMLInputElement.prototype.click = function () { this.files = files; this.dispatchEvent(new Event('change')); };
    try { document.querySelector('.fd-open')?.click(); } finally { HTMLInputElement.prototype.click = click; }
  };
  for (const kind of ['dragover', 'drop'])
    document.addEventListener(kind, event => {
      if (!event.dataTransfer?.types.includes('Files')) return;
      event.preventDefault();
      if (kind == 'drop' && event.dataTransfer.files.length) open(event.dataTransfer.files);
    });

  // Links hold settings: a click copies the address.
  document.addEventListener('click', event => {
    const link = event.target.closest?.('.fd-link');
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    navigator.clipboard.writeText(link.href).then(() => {
      link.textContent = 'Copied';
      setTimeout(() => { link.textContent = 'Copy link'; }, 1500);
    }, () => { location.href = link.href; });
  });

  // A kernel or a server that is gone is said on the page.
  const show = answer => {
    document.getElementById('fd-disconnected')?.remove();
    if (answer && answer.status != 404) return;
    const bar = Object.assign(document.createElement('div'), { id: 'fd-disconnected' });
    bar.setAttribute('role', 'alert');
    bar.textContent = answer ? 'This page has ended: it was closed or an error occurred. Your pictures are kept. ' : 'The studio does not answer. ';
    const again = Object.assign(document.createElement('button'), { textContent: 'Open it again' });
    again.onclick = () => location.reload();
    bar.append(again);
    document.body.append(bar);
  };
  let last = 0;
  const check = async () => {
    if (Date.now() - last < 2000 || document.hidden) return;
    last = Date.now();
    const { baseUrl, kernelId } = JSON.parse(document.getElementById('jupyter-config-data').textContent);
    show(await fetch(`${baseUrl}api/kernels/${kernelId}`, { signal: AbortSignal.timeout(10000) }).catch(() => null));
  };
  for (const event of ['click', 'visibilitychange']) document.addEventListener(event, check);
  setInterval(check, 4000);
})();
