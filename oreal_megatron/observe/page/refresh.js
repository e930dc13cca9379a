/* ---- a served page is loaded again when the logs have grown, unless the reader is at the rollouts ---- */
const { version, poll } = document.documentElement.dataset;
async function look_for_news() {
  try {
    const answer = await fetch("version", { cache: "no-store" });
    const news = answer.ok && (await answer.text()) !== version;
    if (news && !viewer?.contains(document.activeElement)) location.reload();
  } catch { /* the server has stopped: the page stays as it is */ }
}
if (version) setInterval(look_for_news, Number(poll) * 1000);
